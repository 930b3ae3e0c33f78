"""Chapter 06, the whole backbone: its exercises, checks, quiz and figures."""
