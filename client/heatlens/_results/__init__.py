"""What calls return: values, heat maps and pictures."""
