"""What the demo data is made of: names, and the sentences around them, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass


def _each(names: str) -> tuple[str, ...]:
    return tuple(names.split())


@dataclass(frozen=True, slots=True)
class Words:
    """One language's texts."""

    language: str
    cities: tuple[str, ...]
    # (name of the key column and its entries, then the number columns that may stand beside it)
    tables: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    table_task: str
    report_task: str  # to be worked out, with reasoning
    summary_task: str  # total and growth are given
    report: str
    report_keys: tuple[str, str, str, str, str]  # week, last week, sales; total and growth where given
    thoughts: tuple[str, str, str]  # of the sum, of the growth, of the ranking
    separator: str
    chatter: str  # stands before an answer that strays from its template
    chatty_report: str


EN = Words(
    language="en",
    cities=_each(
        "Paris London Rome Berlin Madrid Vienna Oslo Dublin Lisbon Prague Athens Milan Boston Chicago "
        "Denver Seattle Dallas Toronto Tokyo Sydney Delhi Cairo Lima Moscow"
    ),
    tables=(
        (
            "city",
            _each("Paris London Rome Berlin Madrid Vienna Oslo Dublin Lisbon Prague Athens Milan"),
            ("sales", "orders", "shops", "staff"),
        ),
        (
            "item",
            _each("pen book lamp chair table phone bag cup clock mirror shirt shoe"),
            ("price", "stock", "sold", "size"),
        ),
        (
            "name",
            _each("Anna Ben Carol David Emma Frank Grace Henry Jack Kate Mary Paul"),
            ("age", "score", "hours", "level"),
        ),
        (
            "fruit",
            _each("apple banana cherry grape lemon mango orange peach pear plum fig melon"),
            ("price", "weight", "boxes", "sold"),
        ),
    ),
    table_task="Turn the Markdown table into JSON.",
    report_task="Work out the figures, then write the weekly sales report.",
    summary_task="Write the weekly sales report from these figures.",
    report="Weekly sales report, week {week}\nTotal: {total}\nGrowth: {growth}%\nTop cities: {top}",
    report_keys=("week", "last_week", "sales", "total", "growth"),
    thoughts=("Sum: {}", "Growth: {}", "Order: {}"),
    separator=", ",
    chatter="Sure! Here is the JSON you asked for:\n",
    chatty_report="In week {week} we sold {total}, which is {growth}%. The best were {top}. Well done!",
)

ZH = Words(
    language="zh",
    cities=_each(
        "北京 上海 广州 深圳 杭州 成都 重庆 武汉 西安 南京 苏州 天津 长沙 青岛 厦门 宁波 郑州 昆明 大连 沈阳 "
        "合肥 福州 济南 哈尔滨"
    ),
    tables=(
        (
            "城市",
            _each("北京 上海 广州 深圳 杭州 成都 重庆 武汉 西安 南京 苏州 天津"),
            ("销售额", "订单数", "门店数", "员工数"),
        ),
        (
            "商品",
            _each("钢笔 书本 台灯 椅子 桌子 手机 背包 水杯 闹钟 镜子 衬衫 鞋子"),
            ("单价", "库存", "销量", "尺寸"),
        ),
        (
            "姓名",
            _each("王伟 李娜 张敏 刘洋 陈静 杨帆 赵磊 黄丽 周杰 吴霞 徐明 孙浩"),
            ("年龄", "得分", "工时", "级别"),
        ),
        (
            "水果",
            _each("苹果 香蕉 樱桃 葡萄 柠檬 芒果 橙子 桃子 梨 李子 西瓜 草莓"),
            ("单价", "重量", "箱数", "销量"),
        ),
    ),
    table_task="把下面的 Markdown 表格转换成 JSON。",
    report_task="先计算各项数据，再按模板写出销售周报。",
    summary_task="根据给出的数据，按模板写出销售周报。",
    report="第{week}周销售周报\n总销售额：{total}\n环比增长：{growth}%\n销售前三城市：{top}",
    report_keys=("周次", "上周总额", "销售额", "总额", "环比增长"),
    thoughts=("合计：{}", "增长：{}", "排序：{}"),
    separator="、",
    chatter="好的！这是您要的 JSON：\n",
    chatty_report="第{week}周我们一共卖了{total}，环比{growth}%，卖得最好的是{top}，大家辛苦了！",
)

LANGUAGES = {words.language: words for words in (EN, ZH)}
