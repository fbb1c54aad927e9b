"""Operations on boxes, masks and feature maps that know no model."""
