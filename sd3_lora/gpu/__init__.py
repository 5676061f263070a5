"""Tools for a GPU's memory and time that know nothing of SD3."""
