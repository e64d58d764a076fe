"""Adapters for tools that own the training loop: the feedback's group, targets, phase and file.

`feedbackward.integrations.huggingface` is for transformers' `Trainer`, `feedbackward.integrations.lightning` for Lightning.
Nothing else of the package needs them.
"""
