#!/usr/bin/env bash
# Codex: one question by its own command, answered at the endpoint by /v1/responses. `npm install @openai/codex` first.
#   OPENAI_BASE_URL=… OPENAI_API_KEY=… bash scripts/clients/codex_client.sh MODEL QUESTION FOLDER
set -euo pipefail
export CODEX_HOME="$3"
mkdir -p "$CODEX_HOME"
echo "Answer in one sentence." > "$CODEX_HOME/instructions.md"
cat > "$CODEX_HOME/config.toml" <<TOML
model = "$1"
model_provider = "perfit"
model_instructions_file = "$CODEX_HOME/instructions.md"
[model_providers.perfit]
name = "perfit"
base_url = "$OPENAI_BASE_URL"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
TOML
npx --no-install codex exec --skip-git-repo-check --sandbox read-only "$2" < /dev/null
