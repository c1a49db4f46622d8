"""Charts are places in per cent, whatever the numbers are."""

from sd3pipe.pages.charts import Series, line_chart, ticks


def points_of(series: Series) -> list[str]:
    chart = line_chart([series], x_label="step", y_label="loss")
    assert chart is not None
    return list(chart.lines[0].points)


def test_ticks_are_round_numbers_inside_the_range():
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    assert ticks(3, 1997) == [500, 1000, 1500]


def test_ticks_read_as_round_numbers():
    chart = line_chart([Series(name="a", look="c0", x=[0, 62500], y=[0.0, 1.0])], x_label="step", y_label="loss")
    assert chart is not None
    assert [words for _, words in chart.x_ticks] == ["0", "20000", "40000", "60000"]
    assert [words for _, words in chart.y_ticks] == ["0", "0.5", "1"]


def test_a_chart_without_points_is_none():
    assert line_chart([Series(name="a", look="c0", x=[], y=[])], x_label="x", y_label="y") is None
    assert line_chart([Series(name="a", look="c0", x=[1], y=[float("nan")])], x_label="x", y_label="y") is None


def test_a_line_runs_from_left_to_right_and_up_where_values_rise():
    first, middle, last = points_of(Series(name="a", look="c0", x=[1, 2, 3], y=[1.0, 2.0, 3.0]))
    assert (first, middle, last) == ("0.00,95.45", "50.00,50.00", "100.00,4.55")


def test_a_loss_that_is_no_number_leaves_the_rest_of_the_line():
    points = points_of(Series(name="a", look="c0", x=[1, 2, 3], y=[1.0, float("nan"), 2.0]))
    assert [point.split(",")[0] for point in points] == ["0.00", "100.00"]


def test_an_interval_is_an_outline_around_its_line():
    chart = line_chart(
        [Series(name="a", look="c0", x=[1, 2], y=[1, 1], low=[0, 0], high=[2, 2])], x_label="x", y_label="y"
    )
    assert chart is not None
    assert chart.lines[0].band == ["0.00,4.55", "100.00,4.55", "100.00,95.45", "0.00,95.45"]
