"""Commands on checkpoints: inspect, convert, verify, grow."""
