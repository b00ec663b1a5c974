"""What a report says of a run's routers."""

from megatron_ligo.report.routing_notes import describe_routing


def test_the_last_step_with_routers_is_named():
    routers = {"router_entropy": 0.5, "expert_load_min": 0.25, "expert_load_max": 2.0, "dropped_tokens": 3.0}
    (note,) = describe_routing([{"step": 1, **routers}, {"step": 2, **routers, "router_entropy": 0.75}, {"step": 3}])
    assert "at step 2: entropy 0.750" in note and "from 0.25 to 2.00" in note and "6 tokens dropped" in note


def test_a_run_without_experts_has_no_note():
    assert describe_routing([{"step": 1, "loss": 2.0}]) == ()
