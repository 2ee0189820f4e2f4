"""Every metric of a trained model: bounds, sparsity, neighbours, probe, factors.

`evaluate.evaluate_run` computes them all; the functions on arrays (`retrieval`, `probe`,
`disentanglement`, `supports`) need no model, so that baselines are measured in the same way.
docs/metrics.md defines each metric.
"""
