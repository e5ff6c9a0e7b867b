"""The page at `/`, whose files lie in `page/`. It asks the API as any other client does."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pear_store.webpage import page_files, page_policy
from router.serve.problems import Problem


def page_routes() -> list[Route]:
    """`/` and the files that it asks for. They hold no secret: no token is needed."""
    files, policy = page_files("router.serve"), page_policy(images="'self' blob:")

    def answer(name: str) -> Response:
        data, kind = files[name]
        return Response(data, headers={"Content-Security-Policy": policy}, media_type=kind)

    async def show_page(request: Request) -> Response:
        return answer("index.html")

    async def show_file(request: Request) -> Response:
        if (name := request.path_params["file"]) not in files:
            raise Problem(404, "no such file of the page")
        return answer(name)

    return [Route("/", show_page), Route("/page/{file}", show_file)]
