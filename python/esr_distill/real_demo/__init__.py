"""ESR on a real pretrained model: SmolLM2-135M-Instruct and grade-school math, on a CPU."""
