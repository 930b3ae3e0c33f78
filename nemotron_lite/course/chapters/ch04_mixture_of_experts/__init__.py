"""Chapter 04, mixture of experts: its exercises, checks, quiz and figures."""
