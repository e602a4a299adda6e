"""Early warning: what is measured during a run, and the rules that judge it."""
