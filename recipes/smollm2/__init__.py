"""SmolLM2 on Storyline (`docs/smollm2.md`)."""
