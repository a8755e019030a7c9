"""A scripted server of `heatlens evaluate`: a table says how faithful each method is; methods refuse or fail."""

import grpc
from google.rpc import error_details_pb2

from heatlens._wire.names import METHODS, METRICS
from heatlens.v1 import faithfulness_pb2, model_pb2

SERVED = ("grad-cam", "layer-cam", "random-cam", "score-cam")
ONE_PASS = ("grad-cam", "layer-cam", "random-cam")
# Deletion and all else of a method, less a tenth of the image's number.
QUALITY = {"grad-cam": 0.9, "layer-cam": 0.8, "random-cam": 0.5, "score-cam": 0.7}
NAMES = {number: name for name, number in METHODS.items()}


def image_of(number):
    return f"image number {number}".encode()


def number_of(request):
    return int(request.image.encoded.split()[-1])


def measuring(peer):
    """Let the peer serve a model whose maps are as faithful as QUALITY says."""

    def reply(request, context):
        peer.asked.append((number_of(request), NAMES[request.options.method]))
        values = {
            name.replace("-", "_"): QUALITY[NAMES[request.options.method]] - number_of(request) / 10
            for name, number in METRICS.items()
            if number in request.options.faithfulness.metrics
        }
        answer = peer.answer()
        answer.explanations[0].faithfulness.CopyFrom(faithfulness_pb2.Faithfulness(**values))
        return answer

    peer.asked = []
    peer.reply = reply
    peer.replies[0] = reply
    support = [
        model_pb2.MethodSupport(method=METHODS[name], engine="torch", in_steps=name == "score-cam") for name in SERVED
    ]
    model = model_pb2.Model(
        name="tiny",
        task="classification",
        state=model_pb2.Model.STATE_READY,
        methods=[METHODS[name] for name in SERVED],
        method_support=support,
    )
    peer.models = model_pb2.ListModelsResponse(models=[model], default_model="tiny")
    return peer


def failing(served, *codes, on=2, reason="X", field=None, method=None):
    """Let one image fail, with one method or all."""

    def reply(request, context):
        if number_of(request) == on and method in {None, NAMES[request.options.method]}:
            details = [error_details_pb2.ErrorInfo(reason=reason, domain="heatlens")]
            if field is not None:
                violation = error_details_pb2.BadRequest.FieldViolation(field=field, description="wrong")
                details.append(error_details_pb2.BadRequest(field_violations=[violation]))
            served.fail(codes[0], "no", *details)
            return served.replies.popleft()(request, context)
        return served.reply(request, context)

    served.replies[0] = reply


def refusing(served, *methods, field="options.layers[0]"):
    """Let methods refuse the options."""

    def reply(request, context):
        method = NAMES[request.options.method]
        if method not in methods:
            return served.reply(request, context)
        served.asked.append((number_of(request), method))
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description="wrong")
        refuse = served.failure(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"not with {method}",
            error_details_pb2.ErrorInfo(reason="INVALID_OPTION", domain="heatlens"),
            error_details_pb2.BadRequest(field_violations=[violation]),
        )
        return refuse(request, context)

    served.replies[0] = reply
