"""The mathematics and the control of one distillation step: losses, gradient surgery, schedules, recovery.

Nothing here knows Ray, a tokenizer or a file format; every module can be used in a notebook.
"""
