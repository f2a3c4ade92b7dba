"""The HTTP door: engines served to OpenAI clients, and a page to try them in a browser.

Needs the extra `vlmforge[server]`.
"""
