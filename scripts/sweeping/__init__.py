"""The parts of the sweep: tiny configurations, inputs that a model accepts, and the steps of each entry."""
