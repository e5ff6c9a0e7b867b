"""The page at `/`, whose files are in `page/`. It uses the API like any other client."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pear_store.webpage import page_files, page_policy
from router.serve.problems import Problem


def page_routes() -> list[Route]:
    """The routes of `/` and of its files. They need no token, because they hold no secret."""
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
