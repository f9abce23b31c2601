#!/usr/bin/env bash
# llm: its own settings file for OpenAI-compatible models, then a prompt, streamed and not, and a talk.
set -euo pipefail
export LLM_USER_PATH="$3"
mkdir -p "$LLM_USER_PATH"
cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<YAML
- model_id: mine
  model_name: $1
  api_base: "$OPENAI_BASE_URL"
  api_key_name: perfit
YAML
llm=build/clients/llm/bin/llm
"$llm" keys set perfit --value "$OPENAI_API_KEY"
echo "streamed: $("$llm" -m mine -o max_tokens 40 "$2")"
echo "not streamed: $("$llm" -m mine --no-stream -o max_tokens 40 -s "Answer in one sentence." "$2")"
echo "continued: $("$llm" -c -o max_tokens 40 "And why?")"
