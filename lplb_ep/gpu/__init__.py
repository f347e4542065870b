"""From a kernel's source to a launch. Knows no experts."""
