"""One run: its network, optimizers and folder, from the first step to the report of its gradients."""
