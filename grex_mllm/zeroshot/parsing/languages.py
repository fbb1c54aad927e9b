"""Phrases of many languages, as regular expressions: denials of the object, refusals to answer, words for nothing, yes and no.

Every repetition is bounded, so that a search stays linear in the length of the text.
"""

from __future__ import annotations


def _either(words: str) -> list[str]:
    return words.split("|")


_OTHER = (
    r"(?!\s+(?:doubt|question|need|problem|issue|ambiguity|others?|more|additional|further|longer|one else|way|wonder|confusion"
    r"|overlap|only|just"
    r"|uncertainty|reason)\b)"
)
_IMAGE = r"(?:image|picture|photo|photograph|scene|frame|screenshot|figure)"
_CANNOT = (
    r"\b(?:can't|cannot|can not|couldn't|could not|won't|will not|unable to|not able to|wasn't able to|was not able to"
    r"|not capable of|incapable of"
    r"|don't have the (?:ability|capability|capacity|means|tools) to|do not have the (?:ability|capability|capacity|means|tools) to"
    r"|lack the (?:ability|capability) to|not allowed to|not permitted to|must decline to|have to decline to|decline to|refuse to"
    r"|not comfortable|not equipped to|not designed to|failed to|didn't|did not|don't|do not)\s+(?:\w+ly )?"
)
_SENSE = r"(?:see|find|locate|spot|detect|identify|recogni[sz]e|observe|discern|notice|make out|discover)"

# that hold even where boxes follow in the same clause
STRONG_DENIALS = [
    rf"\bthere(?:'s| is| are| was| were|'re| appears? to be| seems? to be)\s+(?:currently |clearly |actually |really |simply |definitely "
    rf"|unfortunately )?(?:no(?! one else)|not(?: an?y?)?|nobody|nothing|none|neither)\b{_OTHER}",
    rf"\bthere (?:is|are|was|were)n't\b{_OTHER}(?! any (?:other|more|doubt))",
    r"\bthere (?:does|do)(?:n't| not) (?:appear|seem) to be\b",
    r"\bno such\b",
    r"\bnone of the (?!other|rest)[^.\n]{0,60}?\b(?:match|fit|correspond|are|is|appear|wear|satisf|meet)",
    r"\b(?:does|do|did)(?: not|n't) (?:\w+ly )?(?:exist\b|contain\b|match any|correspond to any)",
]

_EN = [
    r"\b(?:is|are|was|were)(?: not|n't) (?:\w+ly )?(?:present|visible|found|shown|depicted|there\b|pictured|included|contained"
    r"|featured|detected"
    rf"|identified|located|displayed|here\b|seen|any\b|in (?:the|this) {_IMAGE})",
    r"\b(?:does|do|did)(?: not|n't) (?:\w+ly )?(?:appear in|appear to (?:be (?:present|visible|in|any|a\b)|contain|show|have|exist)"
    r"|appear(?:[.!\n]|$)"
    r"|seem to (?:be (?:present|visible|in|any|a\b)|contain|show|have|exist)|show|depict|include|feature|match|correspond|fit the)",
    rf"\b(?:the|this) {_IMAGE} (?:has|have|contains?|shows?|depicts?|includes?|features?) no\b{_OTHER}",
    rf"\b(?:the|this) {_IMAGE} (?:does|do)(?: not|n't) have\b",
    r"\b(?:sees?|find|found|detect(?:ed)?|contains?|identif(?:y|ied)|spot(?:ted)?|located?) (?:no\b(?! other| more| additional)"
    r"|nothing|nobody|none\b)",
    r"(?:^|[.!?:,]\s*|\b(?:so|that|but|and|is|are|answer) )no (?!doubt|other|problem|need|issue|longer|more"
    r"|worries)[^.\n]{0,100}?\b(?:visible|present"
    rf"|found|detected|match(?:es|ing|ed)?|in (?:the|this) {_IMAGE}|shown|depicted|exists?|appears?|here|identified|located|seen"
    rf"|fits?|satisf\w+"
    r"|corresponds?|meets?|available|applicable|returned)\b",
    r"(?:^|[.!?:,]\s*|\b(?:is|are|answer) )no (?:matching|match|matches|corresponding|relevant|suitable|objects?|targets?|results?"
    r"|instances?"
    r"|detections?|persons?|people|one|box|boxes|bounding box(?:es)?|items?|entity|valid)\b(?! other| else)",
    r"^\W*no\b\s*(?:[.,!]|$)",
    r"\bnone (?:is|are|exists?|found|match(?:es)?|detected|visible|present|in the|that|of (?:them|these|those)|here|fits?)\b",
    r"\b(?:nothing|nobody|no one|no-one) (?:in|is|match|fit|here|correspond|wear|like|found|was|meets|satisf)",
    r"(?:^|[.:]\s+|\banswer is )none\b\W*(?:$|\.)",
    rf"{_CANNOT}{_SENSE}\b",
    r"\bcannot be (?:seen|found|located|identified|detected|spotted)|\b(?:can't|could not|couldn't|can not) be (?:seen|found|located"
    r"|identified|detected)",
    rf"\b(?:not|nowhere) (?:\w+ly )?(?:present|found|visible|to be (?:seen|found)|in (?:the|this) {_IMAGE}|depicted|shown|detected"
    rf"|available|applicable"
    r"|pictured|seen)\b",
    rf"\bnon-?existent\b|\b(?:is|are|was) (?:absent|missing)\b|\babsent (?:from|in)\b|\bmissing from the {_IMAGE}",
    r"\bwithout any (?:match|such)|\black(?:s|ing)? (?:a|any) (?:match|such)|\bnot a single\b|\bzero (?:matches|objects|instances"
    r"|results)\b",
]
_ZH = [
    r"(?:图|圖|画|畫|照片|场景|視野|视野|相片|影像)[^。，,\n]{0,10}?(?:并?没有|並?沒有|不存在|并?无(?!法)|並?無(?!法)|未(?:见|見"
    r"|出现|出現|发现|發現|显示|包含|找到))",
    r"不存在|没有(?:找到|发现|看到|检测|符合|匹配|任何|这样|该|对应|出现|相关|目标|见到|与)|沒有(?:找到|發現|看到|檢測|符合|匹配"
    r"|任何|這樣|該|對應|出現|相關|目標)",
    r"未(?:找到|发现|發現|检测|檢測|能找到|能发现|见到|出现|看到)|找不到|无法(?:找到|定位到|检测到|发现)|無法(?:找到|定位到)|看不到"
    r"|沒?没?看到.{0,4}没有",
    r"没(?:看到|找到|发现|见到)|不在(?:图|圖|画|畫|照片|这)|无(?:匹配|符合|目标|结果|此|对应|相关)|無(?:匹配|符合|目標|結果|此)"
    r"|并不?无|查无|(?:^|[。，,：:\n]\s*)(?:没有|沒有)",
    r"[并並](?:没|沒)有|并未|一(?:个|個|只|隻|人)也(?:没|沒)|都不(?:符合|匹配|是)|均不(?:符合|匹配)|不(?:符合|匹配)(?:描述|该|的)?[。.]?$",
]
_JA_KO = [
    r"(?<!申し訳)(?<!申しわけ)(?:あり|い|存在し|見つかり|見当たり|写ってい|映ってい|含まれてい|確認でき|検出され"
    r"|見え)ません(?:でした)?|存在しない|見当たらない|見つからない|写っていない|映っていない",
    r"該当[^。\n]{0,12}(?:なし|ない|無し)|(?:^|[。、:：]\s*)(?:なし|無し)|(?:は|が)(?:い|あり|)ない(?:です|。|$)|いませんね|ひとつもない",
    r"없(?:습니다|어요|음|다|네요|는 것)|존재하지\s?않|보이지\s?않|찾을 수\s?없|발견(?:되지|할 수)\s?(?:않|없)|나타나지\s?않"
    r"|찾지\s?못|해당\s?(?:없음|사항 없)",
]
_FR = [
    r"\bil n'y a (?:pas|plus|aucun|personne|rien)",
    r"(?<!sans )\baucune? (?!doute|autre|problème)",
    r"(?:^|[.:]\s*)aucune?\b\W*$",
    r"\bn'(?:est|apparaît|apparait|existe|a été|ont été|existent|apparaissent|y figure)\b[^.\n]{0,12}\b(?:pas|aucun)",
    r"\bne (?:sont|correspond\w*|contient|montre|figure\w*|voit|vois|trouve|comporte|détecte|semble\w*|se trouve\w*|représente"
    r"|présente) (?:pas|aucun|rien)",
    r"\bje ne (?:peux|parviens|réussis) pas (?:à )?(?:trouver|localiser|repérer|voir|identifier|détecter)\b",
    r"\bintrouvable|\babsente?s?\b|(?:^|[.:]\s*)pas d[e'] ?\w|\bpersonne ne\b|\brien ne\b|(?:pas|non) trouvée?s?\b|\bne s'y trouve",
]
_DE = [
    r"\b(?:gibt es|es gibt|ist|sind|sehe ich|ich sehe|sehe|finde|fand|enthält|zeigt|wurden?|befinde[tn] sich|existiert|existieren"
    r"|steht|stehen|hat|sieht man"
    r"|passt|hier|da|bild|foto|szene|treffen|trifft)(?: (?:hier|da|dort|jedoch|leider|aber|auf dem bild|im bild|auf dem foto"
    r"|in der szene)){0,3}"
    r" (?:kein(?:e|en|er|es|em)?\b(?! zweifel| weitere| andere)|niemand\b|nichts\b)",
    r"(?:^|[.:!\n]\s*|\bleider )kein(?:e|er|es|en)?\b(?! zweifel| weitere| andere| problem)",
    r"\bnicht (?:vorhanden|zu sehen|sichtbar|gefunden|im bild|auf dem (?:bild|foto)|abgebildet|zu finden|zu erkennen|erkennbar"
    r"|enthalten|gezeigt|finden|sehen)",
    r"\bexistier\w* nicht|\bnichts (?:gefunden|passt|entspricht|passendes)|\bgibt es (?:\w+ ){0,3}nicht|\bniemand (?:ist|trägt|passt"
    r"|entspricht|auf)|\bfehlt\b",
]
_ES_PT_IT = [
    r"\bno (?:hay\b(?! duda| otr| más)|existen?\b|aparecen?\b|figuran?\b|(?:está|están) (?:presente|visible|en la|en esta|aquí)"
    r"|se (?:encuentra|encuentran|encontr|ve\b|ven\b"
    r"|observa|aprecia|detect|muestra|visualiza)|contiene|coincide|corresponde|veo|encuentro|encontré|logro|fue encontrad|localizo"
    r"|es visible|he encontrado)",
    r"\bno puedo (?:ver|encontrar|localizar|identificar|detectar|distinguir)\b|\bning(?:ún|una|uno|un)\b(?! duda| otr)|\bnadie\b"
    r"|\bnada (?:coincide|corresponde|en)|\bausente\b",
    r"\bn[ãa]o (?:há\b(?! dúvida| outr)|ha\b|existem?\b|foi encontrad|foram encontrad|está (?:presente|visível|na)|estão|aparecem?\b"
    r"|consta|se encontra|vejo|encontrei|encontro"
    r"|contém|corresponde|tem\b|mostra|é visível|localizei|(?:posso|consigo|foi possível) (?:ver|encontrar|localizar|identificar"
    r"|detectar))",
    r"\bnenhum(?:a)?\b(?! dúvida| outr)|\bninguém\b|\bnada (?:encontrado|corresponde)|\binexistente\b",
    r"\bnon (?:c'è\b(?! dubbio)|c'e\b|ci sono\b|vi (?:è|sono)|esiste|esistono|(?:è|sono) (?:presente|presenti|visibil"
    r"|stat[oaie] trovat)|trovo|vedo|compare|compaiono|contiene"
    r"|corrisponde|si (?:vede|vedono|trova)|appare|riesco a (?:vedere|trovare|individuare)|ho trovato|mostra)",
    r"\bnessun(?:o|a)?\b(?! dubbio| altr)|\bassente\b",
]
_SLAVIC = [
    r"(?<!\w)нет(?!\w)(?! сомнен| других| больше)|(?<!\w)нету(?!\w)|не (?:найден|обнаруж|видно|вижу|существует|присутству|нахожу"
    r"|изображ|показан|наш[ёе]л|удалось (?:найти|обнаружить)"
    r"|содерж|соответству|наблюда|виден|видна|видны|могу (?:найти|обнаружить|увидеть))|отсутству|(?<!\w)никого|(?<!\w)никто"
    r"|(?<!\w)ничего|ни один|ни одн",
    r"немає|відсутн|не (?:знайдено|видно|існує|бачу)|жодн|няма|липсва|не (?:е намерен|се вижда)|nema\b|nije (?:pronađen|vidljiv)",
    r"\bnie ma\b(?! wątpliwości| innych)|\bbrak\b|\bnie (?:znaleziono|widać|widzę|istnieje|występuje|znajduje|zawiera|pasuje"
    r"|odpowiada|mogę (?:znaleźć|zlokalizować))"
    r"|\bżad(?:en|na|ne|nej|nego)\b|\bnikt\b",
    r"\bnen[ií]\b|\bnejsou\b|\bžádn\w+|\bnenalezen|\bnie je\b|\bnie sú\b|\bnevid[ií]m|\bneexist|\bnikdo\b|\bnenašel",
]
_OTHERS = [
    r"\ber (?:is|zijn|staat|staan|bevindt zich|bevinden zich) (?:hier )?(?:geen|niet|niemand|niets)|(?:^|[.:]\s*)geen\b(?! twijfel)"
    r"|\bniet (?:aanwezig|zichtbaar|gevonden|te zien"
    r"|in de (?:afbeelding|foto)|afgebeeld|vinden)|\bbestaat niet|\b(?:zie|vind|is|bevat|toont) (?:\w+ )?geen\b",
    r"\b(?:finns|finnes|findes|fanns|er|är|ses|syns|ser)(?: det| der| jag| jeg){0,2} (?:ingen|inget|inga|intet|ikke|inte)\b|(?:^"
    r"|[.:]\s*)(?:ingen|inget|inga|intet|ingenting)\b"
    r"|\bhittades inte|\b(?:inte|ikke) (?:hitta|fundet|funnet|synlig|finne|finde)",
    r"\bei (?:ole|löydy|näy|löytynyt|vastaa|sisällä|esiinny)\b|\beivät\b",
    r"\byok(?:tur)?\b|\bbulunam(?:adı|ıyor)|\bbulunm(?:uyor|amakta)|\bmevcut değil|\bgörünm[üe]|\bhiçbir\b|\bgöremiyorum|\bbulamadım"
    r"|\bbulamıyorum",
    r"لا (?:يوجد|توجد|يظهر|تظهر|أرى|يحتوي|تحتوي|شيء)|ليس (?:هناك|في|موجود)|ليست|غير (?:موجود|مرئي|ظاهر)|لم (?:أجد|يتم|أعثر|يُ?عثر)"
    r"|لا أستطيع (?:العثور|إيجاد)",
    r"(?:कोई|कुछ)[^।\n]{0,60}नहीं|नहीं (?:है|हैं|मिल|दिख)|मौजूद नहीं|নেই|পাওয়া যায়নি|இல்லை|లేదు|లేరు",
    r"không (?:có|tìm thấy|tồn tại|thấy|xuất hiện|nhìn thấy|thể tìm)|ไม่(?:มี|พบ|ปรากฏ|เห็น|สามารถหา)",
    r"\btidak (?:ada|ditemukan|terdapat|terlihat|tampak|menemukan|melihat|(?:dapat|bisa) (?:ditemukan|menemukan))|\btiada\b"
    r"|\bwalang\b|\bhakuna\b|\bhayupo\b",
    r"δεν (?:υπάρχ|βρέθηκ|φαίνεται|εμφανίζ|βλέπω|βρίσκ)|κανέν|καμία|(?<!\w)אין(?!\w)|לא (?:נמצא|קיים|מופיע|נראה|רואה|מצאתי)"
    r"|وجود ندارد|پیدا نشد|یافت نشد|دیده نمی",
    r"\bnincs(?:en|enek)?\b|\bnem (?:található|látható|létezik|látok|szerepel|találtam)|\bnu (?:există|exist[ăa]|văd|a fost găsit"
    r"|se vede|apare|este (?:prezent|vizibil))|\bnici(?:un|o)\b|\bno hi ha\b",
]
DENIALS = [*_EN, *_ZH, *_JA_KO, *_FR, *_DE, *_ES_PT_IT, *_SLAVIC, *_OTHERS]

_PICTURE = (
    r"(?:the |this |an? |any |your |that |these |those |provided |attached |actual |visual )*(?:images?|pictures?|photos?"
    r"|photographs?|visuals?|attachments?|files?|visual content)\b"
)
_PERSON = (
    r"(?:real |real-world |specific |particular |private |the |this |that |these |those |actual )*(?:people|individuals?"
    r"|persons?|faces?|who\b|someone|him\b|her\b|them\b|humans?)"
)
REFUSALS = [
    rf"{_CANNOT}(?:directly |actually )?(?:see|view|access|process|open|display|analy[sz]e|interpret|perceive|look at|examine|load"
    rf"|read)(?:ing)?(?: or \w+)? {_PICTURE}",
    rf"{_CANNOT}(?:identify|recogni[sz]e|name)(?: or \w+)? {_PERSON}(?! (?:match|that match|fitting|in (?:the|this) \w+ (?:who|that"
    rf"|match)))",
    rf"{_CANNOT}{_SENSE}(?: or \w+)? (?:objects|people|things|items) in (?:images|pictures|photos)",
    rf"{_CANNOT}{_SENSE} (?:the |its |any |exact |precise |specific |pixel )*(?:coordinates|bounding box(?:es)?)",
    rf"{_CANNOT}(?:provide|giv(?:e|ing)|offer|return|output|produce|generate|determine|draw|create|supply|specify|measure|calculate"
    rf"|compute|pinpoint|tell|share|extract|report"
    r"|estimate|mark|annotate|state|list)(?:ing)? (?:you |you with |me )?(?:[\w'/-]+,? ){0,7}?(?:coordinates?|bounding|box(?:es)?"
    r"|locations?|positions?|annotations?|measurements?|pixels?"
    r"|that|it|this|information|answer|response|identit\w+|names?)\b",
    rf"{_CANNOT}(?:[\w']+ ){{0,4}}?(?:help|assist|comply|fulfill|fulfil|do (?:that|this|so)|engage|support|proceed|participate)\b",
    rf"{_CANNOT}(?:answer|respond|complete|continue|perform|process)\w* (?:to )?(?:that|this|the|your|such) (?:question|request|task"
    rf"|query|prompt)",
    r"\bas an? (?:ai\b|artificial|large language|language model|text-based|text-only)|\bi(?:'m| am) (?:just |only )?(?:an ai\b"
    r"|a (?:text|language)[\w -]{0,20}model|an artificial)",
    r"\b(?:my|our|the|content|safety|usage) (?:guidelines|polic(?:y|ies)|programming)\b|\bviolat\w+[^.\n]{0,30}polic"
    r"|\bprivacy (?:reasons|concerns|and safety)|\bfor privacy\b",
    r"\b(?:there is |there's )?no (?:image|picture|photo|attachment)s?(?: \w+){0,3} (?:attached|provided|uploaded|included|shared|given)\b",
    r"\b(?:don't|do not|didn't|did not|can't|cannot) (?:see|have|receive|have access to) (?:an?|any|the|your|that|access to (?:an?"
    r"|the|any|your))? ?(?:image|picture|photo|attachment)",
    r"\bplease (?:upload|provide|attach|share|send)[^.\n]{0,30}\b(?:image|picture|photo)",
    r"\b(?:image|picture|photo)(?: \w+)? (?:wasn't|was not|hasn't been|has not been|isn't|is not|didn't|did not) (?:attached"
    r"|provided|uploaded|included|load|come through|received)",
    # Chinese, Japanese, Korean
    r"作为(?:一个|一名|一款)?(?:AI|人工智能|大?语言模型|文本)|作為(?:一個|一名)?(?:AI|人工智慧|語言模型)|我(?:是|只是)一?个?(?:AI"
    r"|人工智能|语言模型|文本)",
    r"(?:无法|不能|無法|没法|不可以)(?:直接)?(?:查看|看到|看见|访问|處理|处理|分析|识别|識別|打开|显示|查閱|辨认"
    r"|浏览)[^。，,\n]{0,6}(?:图|圖|照片|画面|人物|人的|个人|身份|真实|文件)",
    r"(?:无法|不能|無法)(?:为您|为你|直接|准确|精确)*(?:提供|给出|确定|生成|输出|回答|帮助|协助|满足|完成|標註|标注|給出)|(?:看不到"
    r"|看不见|没有看到|没看到|未收到|没有收到)(?:任何|您的?|你的?)?(?:图片|圖片|图像|照片)",
    r"AI(?:アシスタント|モデル|として|である)|(?:画像|写真|人物)(?:を|の)[^。\n]{0,12}(?:でき(?:ません|ない)|られません)|(?:お答え"
    r"|提供|お手伝い|特定|回答)(?:することは)?(?:は|が|を)?(?:でき(?:ません|かね)|いたしかね)",
    r"AI(?:로서|이기|이므로| 모델| 어시스턴트)|인공지능(?:으로|이기)|(?:이미지|사진|그림)(?:를|을)\s?(?:직접\s?)?(?:볼|확인할|분석할"
    r"|처리할|열)\s?수\s?없|(?:제공|식별|도와|답변|안내)(?:해|할|드릴|하)?[^.\n]{0,6}수\s?없",
    # other languages
    r"\ben tant qu['e ] ?(?:ia|intelligence|assistant|modèle)|\bje ne (?:peux|suis) pas (?:(?:capable|en mesure|autorisée?) (?:de "
    r"|d')?)?(?:voir|visualiser|analyser|accéder à|ouvrir|afficher)?"
    r" ?(?:les? |l'|d'|cette |votre |vos |des? |ces )(?:images?|photos?|photographies?)",
    r"\bje ne (?:peux|suis) pas (?:(?:capable|en mesure|autorisée?) (?:de |d'))?(?:vous )?(?:identifier (?:les|des|la|cette"
    r"|ces) (?:personne|individu|gens)|fournir|donner|aider|répondre|déterminer"
    r"|indiquer|préciser|traiter)",
    r"\bals ki\b|\bals (?:künstliche|sprachmodell|ein ki)|\bich kann (?:leider |ihnen |dir |als \w+ )*(?:keine |die |das |ihre?n? "
    r"|diese[sn]? )*(?:bild(?:er|es)?|fotos?|koordinaten|personen|menschen"
    r"|gesichter|begrenzungsrahmen)\b|\b(?:dabei|damit|hierbei)(?: leider)? nicht (?:helfen|weiterhelfen)"
    r"|\bnicht in der lage,? (?:bilder|personen|koordinaten|dies)",
    r"\bcomo (?:uma? |modelo de )?(?:ia\b|inteligencia|inteligência|modelo de (?:lenguaje|linguagem)|asistente|assistente)"
    r"|\bcome (?:ia\b|intelligenza|modello|assistente)|\bin quanto (?:ia\b|modello|assistente|intelligenza)",
    r"\bno (?:puedo|soy capaz de|me es posible) (?:ver|visualizar|acceder a|analizar|procesar|abrir) (?:la |las |el |imágenes|fotos?"
    r"|esta |tu |su )*(?:im[áa]gen(?:es)?|fotos?|fotograf)",
    r"\bno (?:puedo|soy capaz de|me es posible) (?:proporcionar|dar|ayudar|ofrecer|responder|determinar"
    r"|identificar (?:a )?(?:personas|las personas|la persona|individuos|la identidad))",
    r"\bn[ãa]o (?:posso|consigo|sou capaz de) (?:ver|visualizar|acessar|analisar|processar|abrir) (?:a |as |o |esta |essa "
    r"|sua )*(?:imag(?:em|ens)|fotos?)",
    r"\bn[ãa]o (?:posso|consigo|sou capaz de) (?:fornecer|dar|ajudar|oferecer|responder|determinar|identificar (?:pessoas|as pessoas"
    r"|a pessoa|indivíduos))",
    r"\bnon (?:posso|sono in grado di|riesco a) (?:vedere|visualizzare|analizzare|accedere|elaborare|aprire) (?:le |l'|la |alle "
    r"|all'|questa |immagini)*(?:immagin[ei]|foto)",
    r"\bnon (?:posso|sono in grado di) (?:fornire|dare|aiutar|offrire|rispondere|determinare|identificare (?:le |la )?person)",
    r"\bкак (?:ии|искусственный|языковая|ai)\b|\bне (?:могу|способ(?:ен|на)|в состоянии|умею) (?:видеть|просматривать|просмотреть"
    r"|анализировать|обрабатывать|открыть) (?:\w+ )?(?:изображени|фото|картин)",
    r"\bне (?:могу|способ(?:ен|на)|имею возможности) (?:определять|определить|идентифицировать|опознавать|опознать|предоставить"
    r"|указать|помочь|назвать|дать|ответить|выполнить)",
    r"\bals ai\b|\bik kan (?:helaas )?(?:de |geen |deze )?(?:afbeelding|beeld|foto|coördinaten|personen|mensen)|\bjako (?:ai|model"
    r"|sztuczna)|\bnie mogę (?:zobaczyć (?:obraz|zdję)|wyświetl|zidentyfikować os|podać|pomóc)",
    r"\byapay zeka\b|\b(?:resmi|görüntü(?:yü|leri)?|fotoğrafı|görseli?)\b (?:gör|analiz ed|inceley)em|\byardımcı olam"
    r"|\bjag kan (?:inte|tyvärr inte) (?:se bilder|identifiera personer|hjälpa|ge)|\bjeg kan ikke (?:se billede|se bilde|hjælpe"
    r"|hjelpe|gi)",
    r"لا (?:أستطيع|يمكنني) (?:رؤية|مشاهدة|عرض|تحليل|تحديد هوية|تقديم|المساعدة|التعرف)|بصفتي|كنموذج|एआई|(?:छवि|चित्र"
    r"|तस्वीर)[^।\n]{0,20}(?:देख|नहीं देख) ?(?:नहीं )?सक",
    r"không thể (?:xem|nhìn|xử lý|cung cấp|giúp|nhận diện|xác định danh tính)|ไม่สามารถ(?:ดู|ระบุ|ให้|ช่วย|มองเห็น|เห็นภาพ|เข้าถึง)"
    r"|\btidak (?:dapat|bisa) (?:melihat (?:gambar|foto)|mengidentifikasi|memberikan|membantu)|\bsebagai (?:ai|model)",
]

NOTHING = _either(
    "none|null|nil|n/a|na|nothing|no|nope|empty|no target|no targets|no object|no objects|no match|no matches|no matching object"
    "|no matching objects|no box|no boxes|no bounding box"
    "|no result|no results|no detection|no detections|not found|not present|not visible|not applicable|not in image|not available"
    "|not exist|does not exist|absent|notarget|none found|nothing found"
    "|none detected|none matching|none match|undefined|no such object|no answer found|no one|nobody|zero objects|empty list|unavailable"
    "|无|無|没有|沒有|无目标|無目標|空|没|不存在|无匹配|未找到|なし|無し|ない|该当なし|該当なし|없음|없다|없습니다|없어요|aucun"
    "|aucune|aucun objet|rien|keine|keiner|kein|keines|nichts|nicht gefunden|nicht vorhanden"
    "|non trouvé|pas trouvé|ninguno|ninguna|ningún|nada|no encontrado|no hay|nenhum|nenhuma|não há|não encontrado|nessuno|nessuna"
    "|niente|non trovato|нет|ничего|не найдено|отсутствует|geen|niets|niet gevonden"
    "|brak|yok|لا شيء|لا يوجد|कोई नहीं|ไม่มี|không có|không|ingen|inget|inga|ei mitään|žádný|nincs|אין|κανένα|tidak ada|немає|hakuna"
)
NO = _either(
    "no|nope|false|non|nein|nee|não|нет|いいえ|いえ|ない|いません|ありません|아니요|아니오|아뇨|없습니다|hayır|yok|لا|नहीं|nie|không"
    "|ไม่|tidak|nej|nei|ei|ne|όχι|לא|nem|nu|不是|没有|沒有|否|不|无|無|немає|ні|bukan|hindi|hapana"
)
YES = _either(
    "yes|yep|yeah|true|oui|ja|jawohl|sí|si|sim|sì|да|はい|ええ|います|あります|네|예|있습니다|evet|var|نعم|हाँ|हां|जी हाँ|tak|có|ใช่"
    "|มี|ya|jo|joo|kyllä|ano|ναι|כן|igen|da|是|有|存在|对|對|так|oo|ndiyo|correct|absolutely"
)
