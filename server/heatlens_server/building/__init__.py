"""From a configuration to an engine that runs, by way of an export where there is one."""
