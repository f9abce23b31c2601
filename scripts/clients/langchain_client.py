"""LangChain's ChatOpenAI: a whole answer, a streamed one, and one by the Responses API."""

import os
import sys

from langchain_openai import ChatOpenAI

model, question = sys.argv[1:3]
settings = {"base_url": os.environ["OPENAI_BASE_URL"], "max_tokens": 40, "max_retries": 0}
chat = ChatOpenAI(model=model, **settings)
answer = chat.invoke([("system", "Answer in one sentence."), ("human", question)])
print("invoke:", answer.content, answer.usage_metadata["total_tokens"])
print("stream:", "".join(chunk.content for chunk in chat.stream(question)))
responses = ChatOpenAI(model=model, use_responses_api=True, **settings)
print("responses:", responses.invoke(question).text)
