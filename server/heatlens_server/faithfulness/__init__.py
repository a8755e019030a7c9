"""How faithful a map is: whether what it marks is what the model looks at. docs/faithfulness.md has the definitions."""
