"""The words of every room: methods, tasks, targets, results, engines, errors. numpy only; imports no other room."""
