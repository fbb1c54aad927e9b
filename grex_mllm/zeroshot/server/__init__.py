"""The backend for OpenAI-compatible servers: vLLM, `transformers serve`, llama.cpp, a cloud; live, or through files of a batch API."""
