"""Examples of your own parts; see docs/rewards.md and docs/own-parts.md."""
