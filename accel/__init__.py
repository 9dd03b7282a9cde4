"""Quantization, sparsity and cost models. Nothing lives here yet: asking for them is a `NotAvailableError`."""
