"""Triton kernels that both GPU vendors run.

Nothing here knows a vendor: what differs comes in by a tuning table (`tuning.Table`), as constants
of the kernel and options of its launch. Sources are valid on Triton 3.6 and later. Programs never
wait for one another. Numbers that change from step to step (tokens, rows) are not specialised, so
that serving compiles nothing new. Functions allocate their results and launch once; they do not
read the device's memory on the host, so that a graph can hold them.
"""
