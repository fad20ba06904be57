"""Chats: messages, tools, and tool calls in a reply."""
