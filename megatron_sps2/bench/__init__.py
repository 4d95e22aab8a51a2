"""An open-loop client of any OpenAI endpoint: traces, arrivals, requests, what they took. Knows no engine."""
