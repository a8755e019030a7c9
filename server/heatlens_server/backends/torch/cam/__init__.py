"""The methods as pure functions of tensors."""
