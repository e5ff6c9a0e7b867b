"""The page at `/`, whose files lie in `page/`. It asks the API as any other client does."""

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router.serve.problems import Problem

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Nothing from another host, nothing inline, and no text that becomes HTML."""


def page_routes() -> list[Route]:
    """`/` and the files that it asks for. They hold no secret: no token is needed."""
    files = {
        file.name: file.read_bytes()
        for file in (resources.files("router.serve") / "page").iterdir()
        if file.name.rpartition(".")[2] in KINDS
    }

    def answer(name: str) -> Response:
        kind = KINDS[name.rpartition(".")[2]]
        return Response(files[name], headers={"Content-Security-Policy": POLICY}, media_type=kind)

    async def show_page(request: Request) -> Response:
        return answer("index.html")

    async def show_file(request: Request) -> Response:
        if (name := request.path_params["file"]) not in files:
            raise Problem(404, "no such file of the page")
        return answer(name)

    return [Route("/", show_page), Route("/page/{file}", show_file)]
