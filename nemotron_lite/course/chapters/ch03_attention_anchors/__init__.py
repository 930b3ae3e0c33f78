"""Chapter 03: its exercises, checks, quiz and figures."""
