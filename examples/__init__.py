"""Examples of your own parts; see docs/reference/rewards.md and docs/how-to/own-parts.md."""
