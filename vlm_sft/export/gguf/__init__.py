"""Export to llama.cpp: a GGUF file of the language model and one of the vision tower (mmproj)."""
