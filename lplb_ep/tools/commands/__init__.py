"""The commands of `lplb-ep`, a module for each; none imports more than its parser needs."""
