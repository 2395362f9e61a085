"""The whole system on one machine: embedded servers and the entrypoints, supervised."""
