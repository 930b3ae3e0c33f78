"""Chapter 01: its exercises, checks, quiz and figures."""
