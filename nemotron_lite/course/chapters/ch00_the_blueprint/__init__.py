"""Chapter 00, what the model is and what it costs: its exercises, checks, quiz and figures."""
