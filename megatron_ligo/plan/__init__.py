"""What a run will take, before any machine is rented: memory by kind, FLOPs, traffic, time, layouts.

job.py       what is planned: a fit or a pretraining of given sizes at a layout
parameters.py  how many numbers a rank holds
states.py    what the DeepSpeed profile says of them
memory.py    bytes of a rank by kind
traffic.py   bytes that a rank sends a step by kind
schedule.py  the pipeline's bubble, simulated
layouts.py   which layouts are refused and why, which fit into a device
text.py      the whole as a page of text
"""
