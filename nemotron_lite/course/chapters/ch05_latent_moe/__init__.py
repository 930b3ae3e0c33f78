"""Chapter 05, LatentMoE: its exercises, checks, quiz and figures."""
