"""What a step costs: the execution graph, its passes, device rates and their closed form. No torch.

Quantization and sparsity are not here yet: asking for them is a `NotAvailableError`."""
