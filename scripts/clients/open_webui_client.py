"""Open WebUI: the models that its backend found at the endpoint, and a chat through it, streamed and whole.

    pip install open-webui
    export WEBUI_AUTH=False ENABLE_OLLAMA_API=False BYPASS_EMBEDDING_AND_RETRIEVAL=True OFFLINE_MODE=True
    export OPENAI_API_BASE_URLS=$OPENAI_BASE_URL OPENAI_API_KEYS=$OPENAI_API_KEY
    open-webui serve --host 127.0.0.1 --port 8080
    python scripts/clients/open_webui_client.py MODEL QUESTION http://127.0.0.1:8080

Without accounts it signs anybody in as its one user.
"""

import json
import sys
import urllib.request

MODEL, QUESTION, URL = sys.argv[1:4]
turns = [{"role": "user", "content": QUESTION}]


def call(path, body=None, token=None):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(URL + path, data, headers), timeout=300)  # noqa: S310


token = json.load(call("/api/v1/auths/signin", {"email": "", "password": ""}))["token"]
print("version:", json.load(call("/api/version"))["version"])
print("models:", ", ".join(model["id"] for model in json.load(call("/api/models", token=token))["data"]))
asked = {"model": MODEL, "messages": turns, "max_tokens": 40}

print("chat, streamed: ", end="")
chunks = 0
for line in call("/api/chat/completions", asked | {"stream": True}, token):
    text = line.decode().strip().removeprefix("data: ")
    for choice in json.loads(text).get("choices", []) if text.startswith("{") else []:
        chunks += 1
        print(choice["delta"].get("content") or choice.get("finish_reason") or "", end="")
print(f" in {chunks} chunks")
whole = json.load(call("/api/chat/completions", asked | {"stream": False}, token))["choices"][0]
print("chat:", whole["message"]["content"], whole["finish_reason"])
