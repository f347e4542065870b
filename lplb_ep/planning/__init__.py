"""From a batch's counts to the slots of its picks: on the CPU, the definition, and on a GPU."""
