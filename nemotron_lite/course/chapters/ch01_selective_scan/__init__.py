"""Chapter 01, the selective scan: its exercises, checks, quiz and figures."""
