"""Generated from proto/heatlens/v1 by `make proto`. Do not edit."""
