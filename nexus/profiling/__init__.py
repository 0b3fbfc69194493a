"""Which layers of a teacher carry a capability: exact ablation, activation statistics, confidence intervals.

Entry points: `nexus.profiling.niwt.NIWTProfiler` and `nexus.profiling.reasoning_eval.evaluate_batch`.
"""
