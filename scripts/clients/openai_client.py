"""The official Python client: chat and responses, whole and streamed. OPENAI_BASE_URL says where."""

import sys

from openai import OpenAI

MODEL, QUESTION = sys.argv[1:3]
client = OpenAI(max_retries=0)
turns = [{"role": "developer", "content": "Answer in one sentence."}, {"role": "user", "content": QUESTION}]

print("models:", ", ".join(model.id for model in client.models.list()))
whole = client.chat.completions.create(model=MODEL, messages=turns, max_completion_tokens=40, seed=1)
print("chat:", whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.total_tokens)

print("chat, streamed: ", end="")
stream = client.chat.completions.create(
    model=MODEL, messages=turns, max_tokens=40, seed=1, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or chunk.choices[0].finish_reason or "", end="")
print("", chunk.usage.total_tokens)

first = client.responses.create(
    model=MODEL, instructions="Answer in one sentence.", input=QUESTION, max_output_tokens=40, store=True
)
print("responses:", first.output_text, first.status, first.usage.total_tokens)
print("responses, streamed: ", end="")
with client.responses.stream(
    model=MODEL, input="And why?", previous_response_id=first.id, max_output_tokens=40
) as events:
    for event in events:
        if event.type == "response.output_text.delta":
            print(event.delta, end="")
    print("", event.response.status)  # the last event: completed, or incomplete at max_output_tokens
print("kept:", client.responses.retrieve(first.id).output_text == first.output_text)
client.responses.delete(first.id)
