#!/usr/bin/env bash
# A server from the shell. Start it by `make serve`, then: examples/curl.sh [http://127.0.0.1:8000]
set -euo pipefail
base="${1:-http://127.0.0.1:8000}"
key="${SPS2_API_KEY:-none}"

call() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer $key" -H 'Content-Type: application/json' "$@"; }

echo '# Is every rank alive?'
call "$base/health"
printf '\n# A completion\n'
call "$base/v1/completions" -d '{"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}'
printf '\n# A chat, streamed\n'
call --no-buffer "$base/v1/chat/completions" -d '{
  "messages": [{"role": "user", "content": "Why is the sky blue? One sentence."}],
  "max_tokens": 48, "temperature": 0, "stream": true, "stream_options": {"include_usage": true}}'
printf '\n# Tokens of a text\n'
call "$base/tokenize" -d '{"prompt": "a short text"}'
printf '\n# As Megatron clients ask\n'
call -X PUT "$base/api" -d '{"prompts": ["Water boils at"], "tokens_to_generate": 8, "top_k": 1}'
printf '\n# What Prometheus sees\n'
call "$base/metrics" | grep -E '^sps2:(num_requests|kv_blocks_leaked|prompt_tokens_total)' || true
