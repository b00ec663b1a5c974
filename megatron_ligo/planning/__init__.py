"""Plans a run before any machine is rented: memory by kind, FLOPs, traffic, step time and valid layouts.

planned_job.py        the planned job: a fit or a pretraining run of given sizes at a layout
parameter_count.py    parameters per rank
optimizer_memory.py   optimizer and buffer sizes that a DeepSpeed profile implies
memory.py             bytes per rank by kind
traffic.py            bytes sent per rank and step by kind
pipeline_schedule.py  simulation of the 1F1B pipeline schedule
layout_search.py      valid layouts, the reasons that rule out others, and the layouts that fit a device
plan_text.py          the plan as text
scaling_table.py      the table of large growths on many devices
run_plan.py           the plan of a config: its fit, its pretraining, and their text
"""
