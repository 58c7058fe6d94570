"""Facts of the published models and the template of their cards, as files beside this one."""
